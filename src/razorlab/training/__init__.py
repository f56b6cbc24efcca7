"""Fine-tuning: what trains, the loop, and what a step costs."""
