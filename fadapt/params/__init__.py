"""The pytree: adapters, params, stacks."""
