"""The first user of catlib: cats drawn by code as a folder of photos, and tiny models to start from."""
