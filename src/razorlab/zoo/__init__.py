"""One network of every family that torchvision, timm and transformers bring, razored and compared: razorlab zoo."""
