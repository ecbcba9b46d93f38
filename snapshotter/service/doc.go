// SPDX-License-Identifier: Apache-2.0

// Package service answers what cohortd is asked: the Storage service of
// api/storage/v1 over ttrpc, and the numbers that Prometheus collects.
//
// It translates and measures; what is done is in packages capture and snapshotter.
// Errors leave it as gRPC status with the class of containerd/errdefs.
package service
