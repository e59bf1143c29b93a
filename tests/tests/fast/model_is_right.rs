//! The model against the kernel's own filesystem: a model that is wrong proves nothing.

use holdfast_tests::{
    cluster,
    model::{Memory, RealTree, check, ops},
};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn the_model_answers_as_the_local_filesystem_does(ops in ops(60)) {
        let dir = cluster::temp_dir();
        check(&mut Memory::default(), &mut RealTree::new(dir.path().join("root")), &ops)?;
    }
}
