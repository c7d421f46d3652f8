"""What datasets of photographs share: where images lie, what is in their bytes, what is kept of them."""
