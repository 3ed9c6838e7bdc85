"""Built-in subjects: implementations that others wrote, under the ops' names. Each needs its own package; none is imported before it is asked for."""
