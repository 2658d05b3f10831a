"""What prompting can reach, from samples: the optimum, its frontier, the bound. numpy only."""
