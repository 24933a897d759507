"""How much memory a computation may take at once."""

#: Numbers in the largest intermediate tensor of products, matrices and word sums: 64 MB in float32.
NUMBERS_AT_ONCE = 2**24
