"""A vision-language model small enough to train in minutes, on which token pruning can be judged.

Images hold handwritten digits in a 5x5 grid, eight of them coloured. A *direct* question names a
colour and asks for its digit. A *chain* question takes that digit modulo eight as the number of a
second colour and asks for the digit found there, so the second look-up depends on the first: the
evidence must still be in the sequence some layers in. Direct questions alone prove nothing, since
one look-up is over after the first layer and any pruning behind it is harmless.
"""
