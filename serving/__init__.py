"""Local model server, client and the files for the official server."""
