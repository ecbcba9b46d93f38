// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cohort-project/cohort/oci"
)

// annotationSandbox is how Kubernetes' CRI names a pod.
const annotationSandbox = "io.kubernetes.cri.sandbox-id"

func groupOf(annotations map[string]string) string {
	if g := annotations[oci.AnnotationGroup]; g != "" {
		return g
	}
	return annotations[annotationSandbox]
}

// readAnnotations reads only the annotations of a bundle's spec.
func readAnnotations(bundle string) (map[string]string, error) {
	b, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if err != nil {
		return nil, fmt.Errorf("read the container's spec: %w", err)
	}
	var spec struct {
		Annotations map[string]string `json:"annotations"`
	}
	if err := json.Unmarshal(b, &spec); err != nil {
		return nil, fmt.Errorf("decode the container's spec: %w", err)
	}
	return spec.Annotations, nil
}
