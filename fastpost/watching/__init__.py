"""Who looks at a run while it goes on: a terminal, trackers, and a reader of the curves who knows what goes wrong."""
