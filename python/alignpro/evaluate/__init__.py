"""Arms of an evaluation and the statistics that defend it."""
