"""`lavender data inspect` and `overlap`: what is in a data set, and what of it is in another one."""
