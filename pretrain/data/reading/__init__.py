"""Files to documents: where text lies, what it is spelled in, and every bad line of it."""
