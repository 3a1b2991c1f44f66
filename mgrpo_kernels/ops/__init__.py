"""One folder an op: the public function and custom op, its reference, its backends."""
