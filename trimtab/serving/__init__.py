"""Many adapters on one base: `store` holds them, `engine` answers rows in mixed batches, `app` speaks HTTP."""
