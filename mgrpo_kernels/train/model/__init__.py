"""The model that trains: loading, packed attention, adapters and chat templates."""
