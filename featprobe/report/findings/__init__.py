"""What heads find: sentences, tables and plots of the answer in defects and parts."""
