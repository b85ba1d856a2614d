"""Many runs: a grid of tasks and rows over seeds, tuned by one protocol, here or on a cluster."""
