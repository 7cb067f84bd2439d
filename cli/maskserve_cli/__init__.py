"""The terminal: words in, words out. What an op is called and takes comes from the op table alone."""
