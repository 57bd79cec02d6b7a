"""Which node holds which token: labels, the rules that follow them, and fewer of them."""
