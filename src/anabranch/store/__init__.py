"""The shared folder of a run: objects named by their content, state by atomic create, and leases made of both."""
