"""Learning from few examples: tasks, networks, and one method a file."""
