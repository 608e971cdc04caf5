"""Reading and writing of files: only these modules open, check, parse and write them."""
