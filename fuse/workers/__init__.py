"""The processes of a run, as Ray actors: one generation worker and one model worker per device."""
