"""What runs the cells of an ablation study, one engine a file."""
