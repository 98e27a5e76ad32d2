"""A run: its folder, its checks, and the artifacts that its commands build."""
