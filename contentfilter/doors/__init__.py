"""How work comes in: the hook's connection, its message, its origin, and admission."""
