"""What heads are trained and scored on: a task per module."""
