"""Learning from few examples: `tasks`, `methods` (one a file), and what runs and scores them."""
