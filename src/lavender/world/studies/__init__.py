"""`lavender study`: does the method work, and why? One study a file, on the built-in world."""
