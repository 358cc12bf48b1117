"""What users set: one flat dataclass per algorithm. Each component gets its own frozen settings from it."""
