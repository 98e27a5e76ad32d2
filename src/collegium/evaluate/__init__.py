"""Teacher-forced scoring of models against text and against the fused target."""
