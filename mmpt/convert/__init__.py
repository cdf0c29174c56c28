"""Text models of others become models of ours: `mmpt init`."""
