"""Our own run folders: what is saved in them, read from them, and where a run begins."""
