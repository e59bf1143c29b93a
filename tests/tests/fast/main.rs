//! Checks that need no process and no mount: formats, walls, the model and its double on the local disk.

mod golden;
mod hostile;
mod model_is_right;
mod tidy;
