"""How much quality each cache format costs, and how many bytes it takes: ours beside the peers."""
