"""Built-in subjects: implementations that others wrote, under the ops' names. Each needs its package and is imported when asked for."""
