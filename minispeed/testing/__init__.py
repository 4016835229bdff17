"""What the tests share: strategies and equivalence checks."""
