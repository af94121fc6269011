"""All trainable parameters, and the step that makes the tensors of both networks of them."""
