// SPDX-License-Identifier: Apache-2.0

// Package harness gives integration tests a containerd and a cohortd of their
// own, and looks after every test that nothing was left behind.
//
// A test binary has one instance, started by contrib/setup/up.sh when the first
// test asks for it and ended by down.sh after the last:
//
//	func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }
//
//	func TestSomething(t *testing.T) {
//		in := harness.Up(t)
//		c := in.Run(t, harness.CohortOnCohort, harness.Container{
//			Image: harness.ToolsImage, Args: []string{"/bin/ticker"},
//		})
//		...
//	}
//
// Two variables of the environment say otherwise: COHORT_TEST_RUN names the
// folder of an instance that runs already and is neither started nor ended;
// COHORT_REQUIRE=1 makes a test fail where it would skip for want of something.
//
// Tests of one binary run one after the other (no t.Parallel): they measure time,
// and what one of them leaves behind would be blamed on another. Names come from
// Instance.Name and hold a tag of the instance, by which the check after each test
// tells this binary's remains from other people's.
//
// Running containers, and the cohort command, are package
// integration/shop/harness's; this one adds the instance, the clean-up and the
// checks.
package harness
