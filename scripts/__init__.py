"""What runs before or after training. Commands stand in a folder for each job; `parts/` holds what they are made of."""
