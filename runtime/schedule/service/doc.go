// SPDX-License-Identifier: Apache-2.0

// Package service connects the schedules (package schedule) with the outside: the
// Schedules service of api/schedule/v1 over ttrpc, the numbers that Prometheus
// collects, and the passes, which are what the command line does for "cohort
// checkpoint".
//
// Errors leave the service as gRPC status with the class of containerd/errdefs.
package service
