"""Arrays in files, a module a format: each opens one as rows, checks it, and holds no handle between reads."""
