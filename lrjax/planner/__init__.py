"""Plans: what runs how, under a memory budget."""
