"""What comes from files and goes to them: opened, checked, parsed and written in these modules alone."""
