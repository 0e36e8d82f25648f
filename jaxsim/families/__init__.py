"""Families of random instances: descriptions (`spec`), random words (`counter`), draws (`draw`)."""
