"""The report: figures and one HTML page."""
