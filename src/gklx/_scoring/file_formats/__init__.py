"""Arrays in files, one module for each format: it opens and checks an array, and keeps no file open between reads."""
