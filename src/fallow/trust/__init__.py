"""Who is who, who may do what, and whether anything may run at all."""
