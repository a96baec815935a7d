"""What two rooms exchange: plain data and errors. Standard library and msgspec only."""
