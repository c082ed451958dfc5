"""What an adapter is: its files, its pages in the pool, and where it is cached."""
