"""Sign-in by an OpenID Connect provider, such as a hospital's own: authorization code with PKCE, state and nonce."""
